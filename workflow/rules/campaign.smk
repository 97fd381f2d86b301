# Simulate a monitor campaign: the default source of images.
rule campaign:
    input:
        code=stages()["campaign"].code,
    output:
        images=RAW_IMAGES,
        blobs="data/raw/blobs.csv",
        frames="data/raw/frames.csv",
    log:
        "logs/campaign.log",
    benchmark:
        "logs/campaign.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: 2
    resources:
        cpus_per_task=2,
        mem_mb=2000,
        runtime=minutes("campaign", PARAMS.campaign.n_frames),
    params:
        settings=settings("campaign"),
    shell:
        "blobpipe campaign --threads {threads} 2>&1 | tee {log} >&2"


STAGE_FILES["campaign"] = list(map(str, rules.campaign.output))
