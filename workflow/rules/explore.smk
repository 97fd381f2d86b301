# Test the report's alternatives (ISR 7). Optional: only `snakemake explore` runs it. It is not in dvc.yaml, because `dvc repro`
# and `dvc status` would then require it; the modules that it imports are therefore listed here.
rule explore:
    input:
        difference=STAGE_FILES["difference"],
        scale=STAGE_FILES["scale"],
        stamps="results/cutout/stamps.fits",
        subframes=["results/cutout/train_subframes.csv", "results/cutout/validation_subframes.csv"],
        blobs=["results/cutout/train_blobs.csv", "results/cutout/validation_blobs.csv"],
        models=["results/train/model.safetensors", "results/dense/model.safetensors"],
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
                "networks/model_file",
                "networks/report_network",
                "noise/level",
                "noise/outputs",
                "noise/spectrum",
                "noise/whiten",
                "simulation/clutter",
                "simulation/cutout",
                "simulation/recipes",
                "simulation/render",
                "simulation/render_gpu",
                "simulation/stamps",
                "validation/autoencoder",
                "validation/explore",
                "validation/explore_figures",
            ],
        ),
    output:
        metrics=report("results/explore/metrics.json", caption="../report/explore.rst", category="Alternatives"),
        tables=multiext("results/explore/", "scores.csv", "embedding.csv"),
        anomaly=report("results/explore/anomaly.png", caption="../report/anomaly.rst", category="Alternatives"),
        embedding=report("results/explore/embedding.png", caption="../report/embedding.rst", category="Alternatives"),
    log:
        "logs/explore.log",
    benchmark:
        "logs/explore.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: 2
    resources:
        cpus_per_task=2,
        mem_mb=6000,
        runtime=60,
    params:
        settings=settings_of("explore"),
    shell:
        "blobpipe explore 2>&1 | tee {log} >&2"
