# Draw noise, rotations and flips for the training subframes (ISR 3.4).
rule augment:
    input:
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        stamps="results/cutout/stamps.fits",
        subframes="results/cutout/train_subframes.csv",
        blobs="results/cutout/train_blobs.csv",
        code=stages()["augment"].code,
    output:
        recipes="results/augment/train.csv",
        sheet=report("results/augment/contact_sheet.png", caption="../report/augment.rst", category="Training data"),
    log:
        "logs/augment.log",
    benchmark:
        "logs/augment.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=30,
    params:
        settings=settings("augment"),
    shell:
        "blobpipe augment 2>&1 | tee {log} >&2"


STAGE_FILES["augment"] = list(map(str, rules.augment.output))
