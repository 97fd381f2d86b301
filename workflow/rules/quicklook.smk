# Run the daily routine on all images of data/raw. Optional: only `snakemake quicklook` runs it. The log is not declared as an
# output, because Snakemake would delete it, and the reviews in it, before the next run; a new run adds new images to it. Images
# in the log are not searched again, whatever has changed, so neither code nor settings are inputs. Nor is the catalogue, in
# which every blob is known: the log is to record when each blob landed.
rule quicklook:
    input:
        images=RAW_IMAGES,
        model="results/detect/model.safetensors",
    output:
        images="quicklook/images.csv",
        candidates="quicklook/candidate_list.csv",
    log:
        "logs/quicklook.log",
    benchmark:
        "logs/quicklook.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: 2
    resources:
        cpus_per_task=2,
        mem_mb=4000,
        runtime=minutes("quicklook", len(ROWS)),
    shell:
        "( blobpipe quicklook data/raw --silent --model {input.model}"
        " && blobpipe log images --out {output.images}"
        " && blobpipe log candidate_list --out {output.candidates} ) 2>&1 | tee {log} >&2"
