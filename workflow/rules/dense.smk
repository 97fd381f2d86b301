# Train the dense network. A killed job continues from results/dense/checkpoint, which is not declared as an output.
rule dense:
    input:
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        stamps="results/cutout/stamps.fits",
        subframes=["results/cutout/train_subframes.csv", "results/cutout/validation_subframes.csv"],
        blobs=["results/cutout/train_blobs.csv", "results/cutout/validation_blobs.csv"],
        augmentation="results/augment/train.csv",
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
    threads: cores(PARAMS.dense.threads)
    resources:
        cpus_per_task=PARAMS.dense.threads,
        mem_mb=6000,
        runtime=minutes("dense", PARAMS.cutout.n_train * PARAMS.dense.epochs),
    params:
        settings=settings("dense"),
    shell:
        "blobpipe dense 2>&1 | tee {log} >&2"


STAGE_FILES["dense"] = list(map(str, rules.dense.output))
