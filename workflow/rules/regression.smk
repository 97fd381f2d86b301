# Search the historical cases, whole images that were the first to show a new blob (ISR 7), with all three detectors.
# For the thresholds of two of them, all held-out images are searched, batch by batch.
rule regression_batch:
    input:
        frames=ancient("data/raw/frames.csv"),
        blobs=CATALOGUE,
        reference="data/difference/reference.fits.fz",
        difference="data/difference/frames-{batch}.csv",
        scale="data/scale/frames-{batch}.csv",
        recipes=["results/cutout/train_subframes.csv", "results/cutout/train_blobs.csv"],
        model="results/train/model.safetensors",
        code=stages()["regression"].code,
    output:
        "results/regression/batches/baselines-{batch}.csv",
    log:
        "logs/regression-{batch}.log",
    benchmark:
        "logs/regression-{batch}.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: cores(2)
    resources:
        cpus_per_task=2,
        mem_mb=6000,
        runtime=minutes("regression", BATCH),
    params:
        settings=settings_of("evaluate.radii_px"),
        rows=lambda wildcards: up_to(wildcards.batch),
    shell:
        "nice blobpipe regression --batch {wildcards.batch} 2>&1 | tee {log} >&2"  # the dense network's search has priority


rule regression:
    input:
        batches=each_batch("results/regression/batches/baselines-{batch}.csv"),
        frames="data/raw/frames.csv",
        blobs=CATALOGUE,
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        recipes=["results/cutout/train_subframes.csv", "results/cutout/train_blobs.csv"],
        models=["results/train/model.safetensors", "results/detect/model.safetensors"],
        candidates="results/detect/candidates.csv",
        code=stages()["regression"].code,
    output:
        metrics=report(
            "results/regression/metrics.json", caption="../report/regression.rst", category="Regression test"
        ),
        cases=report("results/regression/cases.csv", caption="../report/cases_table.rst", category="Regression test"),
        detectors=report(
            "results/regression/detectors.csv", caption="../report/detectors_table.rst", category="Regression test"
        ),
        tables=multiext("results/regression/", "frames.csv", "alarms.csv", "recall.csv"),
        side_by_side=report(
            "results/regression/detectors.png", caption="../report/detectors.rst", category="Regression test"
        ),
        figure=report("results/regression/cases.png", caption="../report/cases.rst", category="Regression test"),
        dense_figure=report(
            "results/regression/dense_cases.png", caption="../report/dense_cases.rst", category="Regression test"
        ),
        gallery=report("results/regression/gallery.png", caption="../report/gallery.rst", category="Regression test"),
        page=report("results/regression/cases.html", caption="../report/casebook.rst", category="Regression test"),
    log:
        "logs/regression.log",
    benchmark:
        "logs/regression.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: cores(2)
    resources:
        cpus_per_task=2,
        mem_mb=6000,
        runtime=60,
    params:
        settings=settings("regression"),
    shell:
        "blobpipe regression --gather 2>&1 | tee {log} >&2"


STAGE_FILES["regression"] = [
    *each_batch("results/regression/batches/baselines-{batch}.csv"),
    *map(str, rules.regression.output),
]
