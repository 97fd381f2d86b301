# Search all images with the dense network, and set its operating point.
rule detect:
    input:
        frames="data/raw/frames.csv",
        blobs=CATALOGUE,
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        subframes="results/cutout/train_subframes.csv",
        superimposed="results/cutout/train_blobs.csv",
        model="results/dense/model.safetensors",
        code=stages()["detect"].code,
    output:
        model="results/detect/model.safetensors",
        metrics=report("results/detect/metrics.json", caption="../report/detect.rst", category="Dense network"),
        candidates="results/detect/candidates.csv",
        tables=multiext("results/detect/", "frames.csv", "reliability.csv"),
        reliability=report(
            "results/detect/reliability.png", caption="../report/reliability.rst", category="Dense network"
        ),
    log:
        "logs/detect.log",
    benchmark:
        "logs/detect.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: SHARED_THREADS
    resources:
        mem_mb=6000,
        runtime=60,
    params:
        settings=settings("detect"),
    shell:
        "blobpipe detect 2>&1 | tee {log} >&2"


STAGE_FILES["detect"] = list(map(str, rules.detect.output))
