# Search all images with the dense network, batch by batch, and set its operating point.
rule detect_batch:
    input:
        frames=ancient("data/raw/frames.csv"),
        blobs=CATALOGUE,
        reference="data/difference/reference.fits.fz",
        difference="data/difference/frames-{batch}.csv",
        scale="data/scale/frames-{batch}.csv",
        model="results/dense/model.safetensors",
        code=stages()["detect"].code,
    output:
        "results/detect/batches/candidates-{batch}.csv",
    log:
        "logs/detect-{batch}.log",
    benchmark:
        "logs/detect-{batch}.tsv"
    priority: 10  # before regression_batch: more stages wait for it
    conda:
        "../envs/blobpipe.yaml"
    threads: cores(PARAMS.detect.threads)
    resources:
        cpus_per_task=PARAMS.detect.threads,
        mem_mb=6000,
        runtime=minutes("detect", BATCH),
    params:
        settings=settings_of("detect", "vetting"),
        rows=lambda wildcards: up_to(wildcards.batch),
    shell:
        "blobpipe detect --batch {wildcards.batch} 2>&1 | tee {log} >&2"


rule detect:
    input:
        batches=each_batch("results/detect/batches/candidates-{batch}.csv"),
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
    threads: cores(PARAMS.detect.threads)
    resources:
        cpus_per_task=PARAMS.detect.threads,
        mem_mb=6000,
        runtime=minutes("detect", PARAMS.detect.n_noise + PARAMS.detect.n_quiet + PARAMS.cutout.max_frames),
    params:
        settings=settings("detect"),
    shell:
        "blobpipe detect --gather 2>&1 | tee {log} >&2"


STAGE_FILES["detect"] = [
    *each_batch("results/detect/batches/candidates-{batch}.csv"),
    *map(str, rules.detect.output),
]
