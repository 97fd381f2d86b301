# Search the historical cases, whole images that were the first to show a new blob (ISR 7), with all three detectors.
rule regression:
    input:
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
    threads: SHARED_THREADS
    resources:
        mem_mb=6000,
        runtime=60,
    params:
        settings=settings("regression"),
    shell:
        "blobpipe regression 2>&1 | tee {log} >&2"


STAGE_FILES["regression"] = list(map(str, rules.regression.output))
