# The dense network. A job that was killed goes on from results/dense/checkpoint, which is no output.
rule dense:
    input:
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        stamps=rules.cutout.output.stamps,
        subframes=[rules.cutout.output.train_subframes, rules.cutout.output.validation_subframes],
        blobs=[rules.cutout.output.train_blobs, rules.cutout.output.validation_blobs],
        augmentation=rules.augment.output.recipes,
        code=stages()["dense"].code,
    output:
        model="results/dense/model.safetensors",
        history="results/dense/history.csv",
        figure=report("results/dense/history.png", caption="../report/dense.rst", category="Dense network"),
        metrics=report("results/dense/metrics.json", caption="../report/train_metrics.rst", category="Dense network"),
    log:
        "logs/dense.log",
    benchmark:
        "logs/dense.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: SHARED_THREADS
    resources:
        mem_mb=6000,
        runtime=600,
    params:
        settings=settings("dense"),
    shell:
        "blobpipe dense 2>&1 | tee {log} >&2"


STAGE_FILES["dense"] = list(rules.dense.output)
