# Train the report's network (ISR 4, 5). A killed job continues from results/train/checkpoint, which is not declared as an output.
rule train:
    input:
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        stamps="results/cutout/stamps.fits",
        subframes=["results/cutout/train_subframes.csv", "results/cutout/validation_subframes.csv"],
        blobs=["results/cutout/train_blobs.csv", "results/cutout/validation_blobs.csv"],
        augmentation="results/augment/train.csv",
        code=stages()["train"].code,
    output:
        model="results/train/model.safetensors",
        history="results/train/history.csv",
        figure=report("results/train/history.png", caption="../report/train.rst", category="Training"),
        metrics=report("results/train/metrics.json", caption="../report/train_metrics.rst", category="Training"),
    log:
        "logs/train.log",
    benchmark:
        "logs/train.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: cores(PARAMS.train.threads)
    resources:
        cpus_per_task=PARAMS.train.threads,
        mem_mb=6000 + PARAMS.train.keep_rendered * PARAMS.cutout.n_train * PARAMS.augment.copies * 131 // 1000,
        runtime=minutes("train", PARAMS.cutout.n_train * PARAMS.train.epochs),
    params:
        settings=settings("train"),
    shell:
        "nice blobpipe train 2>&1 | tee {log} >&2"  # the dense network has priority: more stages wait for it


STAGE_FILES["train"] = list(map(str, rules.train.output))
