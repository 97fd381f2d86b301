# Draw recipes of subframes with and without superimposed blobs, and cut the stamps they use (ISR 3.3).
rule cutout:
    input:
        frames="data/raw/frames.csv",
        blobs=CATALOGUE,
        reference="data/difference/reference.fits.fz",
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        code=stages()["cutout"].code,
    output:
        stamps="results/cutout/stamps.fits",
        stamp_table="results/cutout/stamps.csv",
        train_subframes="results/cutout/train_subframes.csv",
        train_blobs="results/cutout/train_blobs.csv",
        validation_subframes="results/cutout/validation_subframes.csv",
        validation_blobs="results/cutout/validation_blobs.csv",
        sheet=report("results/cutout/contact_sheet.png", caption="../report/cutout.rst", category="Training data"),
    log:
        "logs/cutout.log",
    benchmark:
        "logs/cutout.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=30,
    params:
        settings=settings("cutout"),
    shell:
        "blobpipe cutout 2>&1 | tee {log} >&2"


STAGE_FILES["cutout"] = list(map(str, rules.cutout.output))
