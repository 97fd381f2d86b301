# Evaluate the report's network, the dense network and a matched filter on validation subframes (ISR 6).
rule evaluate:
    input:
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        stamps="results/cutout/stamps.fits",
        subframes="results/cutout/validation_subframes.csv",
        blobs="results/cutout/validation_blobs.csv",
        models=["results/train/model.safetensors", "results/detect/model.safetensors"],
        code=stages()["evaluate"].code,
    output:
        metrics=report("results/evaluate/metrics.json", caption="../report/evaluate.rst", category="Evaluation"),
        tables=multiext(
            "results/evaluate/",
            "predictions.csv",
            "failures.csv",
            "roc.csv",
            "precision_recall.csv",
            "calibration.csv",
            "snr.csv",
        ),
        confusion=report("results/evaluate/confusion.png", caption="../report/confusion.rst", category="Evaluation"),
        by_snr=report("results/evaluate/by_snr.png", caption="../report/by_snr.rst", category="Evaluation"),
        roc=report("results/evaluate/roc.png", caption="../report/roc.rst", category="Evaluation"),
        precision_recall=report(
            "results/evaluate/precision_recall.png", caption="../report/precision_recall.rst", category="Evaluation"
        ),
        calibration=report(
            "results/evaluate/calibration.png", caption="../report/calibration.rst", category="Evaluation"
        ),
        saliency=report("results/evaluate/saliency.png", caption="../report/saliency.rst", category="Evaluation"),
        failures=report("results/evaluate/failures.png", caption="../report/failures.rst", category="Evaluation"),
    log:
        "logs/evaluate.log",
    benchmark:
        "logs/evaluate.tsv"
    priority: 10  # before completeness and regression, which take less time
    conda:
        "../envs/blobpipe.yaml"
    threads: cores(2)
    resources:
        cpus_per_task=2,
        mem_mb=6000,
        runtime=60,
    params:
        settings=settings("evaluate"),
    shell:
        "blobpipe evaluate 2>&1 | tee {log} >&2"


STAGE_FILES["evaluate"] = list(map(str, rules.evaluate.output))
