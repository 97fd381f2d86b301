# Run the daily routine on all images of data/raw, batch after batch: its log has one writer, and what an image shows depends on
# what those before it have shown. Optional: only `snakemake quicklook` runs it. The log is not declared as an output, because
# Snakemake would delete it, and the reviews in it, before the next run; a new run adds new images to it. Images in the log are
# not searched again, whatever has changed, so neither code nor settings are inputs, and a new model is no reason to run. Nor is
# the catalogue an input, in which every blob is known: the log is to record when each blob landed.
rule quicklook_batch:
    input:
        frames=ancient("data/raw/frames.csv"),
        images=lambda wildcards: RAW_IMAGES[BATCHES[int(wildcards.batch)]],
        model=ancient("results/detect/model.safetensors"),
        before=ancient(lambda wildcards: batch_before("quicklook/batches/{batch}.done", wildcards.batch)),
    output:
        touch("quicklook/batches/{batch}.done"),
    log:
        "logs/quicklook-{batch}.log",
    benchmark:
        "logs/quicklook-{batch}.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: 2
    resources:
        cpus_per_task=2,
        mem_mb=4000,
        runtime=minutes("quicklook", BATCH),
    shell:
        "blobpipe quicklook data/raw --silent --model {input.model} --batch {wildcards.batch} 2>&1 | tee {log} >&2"


rule quicklook:
    input:
        each_batch("quicklook/batches/{batch}.done"),
    output:
        images="quicklook/images.csv",
        candidates="quicklook/candidate_list.csv",
    log:
        "logs/quicklook.log",
    benchmark:
        "logs/quicklook.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        "( blobpipe log images --out {output.images}"
        " && blobpipe log candidate_list --out {output.candidates} ) 2>&1 | tee {log} >&2"
