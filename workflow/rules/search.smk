# Search for better settings of the report's network (ISR 4, 7). Optional, as explore is: only `snakemake search` runs it. Workers
# share a journal, results/search/journal.log, which is not declared as an output; a killed one goes on.
rule search_worker:
    input:
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        stamps="results/cutout/stamps.fits",
        subframes=["results/cutout/train_subframes.csv", "results/cutout/validation_subframes.csv"],
        blobs=["results/cutout/train_blobs.csv", "results/cutout/validation_blobs.csv"],
        augmentation="results/augment/train.csv",
        code=expand(
            "src/blobpipe/{module}.py",
            module=[
                "core/arrays",
                "core/blob_shapes",
                "core/detector",
                "core/files",
                "core/fits_images",
                "core/hdus",
                "core/metrics",
                "core/plotting",
                "core/random_streams",
                "core/tables",
                "core/threads",
                "core/unpack",
                "images/clip",
                "images/scale",
                "images/tiles",
                "networks/dense_network",
                "networks/fused",
                "networks/fused_gpu",
                "networks/fused_loops",
                "networks/kernels",
                "networks/loop",
                "networks/model_file",
                "networks/report_network",
                "networks/train",
                "noise/level",
                "noise/outputs",
                "noise/spectrum",
                "noise/whiten",
                "simulation/augment",
                "simulation/clutter",
                "simulation/cutout",
                "simulation/recipes",
                "simulation/render",
                "simulation/render_gpu",
                "simulation/stamps",
                "validation/search",
                "validation/search_figures",
            ],
        ),
    output:
        "results/search/worker-{number}.done",
    log:
        "logs/search-worker-{number}.log",
    benchmark:
        "logs/search-worker-{number}.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: PARAMS.search.threads
    resources:
        cpus_per_task=PARAMS.search.threads,
        mem_mb=2000 + PARAMS.search.n_train * PARAMS.augment.copies * 131 // 1000,
        runtime=minutes("train", n_searched()),
    params:
        settings=settings_of("search", "train"),
    shell:
        "blobpipe search --worker {wildcards.number} 2>&1 | tee {log} >&2"


rule search_results:
    input:
        expand("results/search/worker-{number}.done", number=range(1, PARAMS.search.n_workers + 1)),
    output:
        metrics=report("results/search/metrics.json", caption="../report/search.rst", category="Search"),
        tables=multiext("results/search/", "trials.csv", "best.yaml"),
        figures=report(
            multiext("results/search/", "history.png", "importance.png", "parallel.png", "cost.png"),
            caption="../report/search.rst",
            category="Search",
        ),
    log:
        "logs/search_results.log",
    benchmark:
        "logs/search_results.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=settings_of("search", "train"),
    shell:
        "blobpipe search 2>&1 | tee {log} >&2"


rule search:
    input:
        multiext(
            "results/search/",
            *("metrics.json", "trials.csv", "best.yaml", "history.png", "importance.png", "parallel.png", "cost.png"),
        ),
    log:
        "logs/search.log",
    localrule: True
    conda:
        "../envs/blobpipe.yaml"
    shell:
        "python workflow/scripts/dvc_bridge.py add results/search 2>&1 | tee {log} >&2"
