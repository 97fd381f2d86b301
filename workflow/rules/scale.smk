# Convert clipped images to units of their standard deviation (ISR 3.2).
rule scale:
    input:
        table="data/clip/frames-{batch}.csv",
        code=stages()["scale"].code,
    output:
        "data/scale/frames-{batch}.csv",
    log:
        "logs/scale-{batch}.log",
    benchmark:
        "logs/scale-{batch}.tsv"
    group:
        "batch"
    conda:
        "../envs/blobpipe.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=minutes("scale", BATCH),
    params:
        settings=settings("scale"),
    shell:
        "blobpipe scale --batch {wildcards.batch} 2>&1 | tee {log} >&2"


STAGE_FILES["scale"] = each_batch("data/scale/frames-{batch}.csv")
