# Inject blobs of every depth and size into held-out images; count what each detector finds at the same false-alarm rate.
rule completeness:
    input:
        frames="data/raw/frames.csv",
        blobs=CATALOGUE,
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        subframes="results/cutout/train_subframes.csv",
        superimposed="results/cutout/train_blobs.csv",
        models=["results/detect/model.safetensors", "results/train/model.safetensors"],
        batches=each_batch("results/regression/batches/baselines-{batch}.csv"),
        code=stages()["completeness"].code,
    output:
        metrics=report(
            "results/completeness/metrics.json", caption="../report/completeness_metrics.rst", category="Completeness"
        ),
        tables=multiext("results/completeness/", "injections.csv", "completeness.csv", "limits.csv"),
        figure=report(
            "results/completeness/completeness.png", caption="../report/completeness.rst", category="Completeness"
        ),
    log:
        "logs/completeness.log",
    benchmark:
        "logs/completeness.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: cores(PARAMS.completeness.threads)
    resources:
        cpus_per_task=PARAMS.completeness.threads,
        mem_mb=6000,
        runtime=60,
    params:
        settings=settings("completeness"),
    shell:
        "blobpipe completeness 2>&1 | tee {log} >&2"


STAGE_FILES["completeness"] = list(map(str, rules.completeness.output))
