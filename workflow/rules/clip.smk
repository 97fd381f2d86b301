# Limit difference images to a multiple of their zscale limits (ISR 3.1).
rule clip:
    input:
        table="data/difference/frames-{batch}.csv",
        reference="data/difference/reference.fits.fz",
        code=stages()["clip"].code,
    output:
        "data/clip/frames-{batch}.csv",
    log:
        "logs/clip-{batch}.log",
    benchmark:
        "logs/clip-{batch}.tsv"
    group:
        "batch"
    conda:
        "../envs/blobpipe.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=minutes("clip", BATCH),
    params:
        settings=settings("clip"),
    shell:
        "blobpipe clip --batch {wildcards.batch} 2>&1 | tee {log} >&2"


STAGE_FILES["clip"] = each_batch("data/clip/frames-{batch}.csv")
