# Back-processing: the daily routine over all images of data/raw. Optional: only `snakemake quicklook` runs it. The log is
# no output, which Snakemake would remove before the next run, and people's reviews with it: it stays, and takes what is new.
# Images that it has are not searched again, whatever has changed since, so neither code nor settings stand here. No
# catalogue either, in which every blob is known: the log says itself when each landed.
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
        mem_mb=4000,
        runtime=120,
    shell:
        "( blobpipe quicklook data/raw --silent --model {input.model}"
        " && blobpipe log images --out {output.images}"
        " && blobpipe log candidate_list --out {output.candidates} ) 2>&1 | tee {log} >&2"
