# Subtract from each image the median stack of the preceding ones. The reference stack gives the blob pattern and the stamps.
rule reference:
    input:
        images=images(ROWS[:REACH]),
        blobs=CATALOGUE,
        bad_pixels=PARAMS.bad_pixels.files,
        frames=ancient("data/raw/frames.csv"),
        code=stages()["difference"].code,
    output:
        "data/difference/reference.fits.fz",
    log:
        "logs/reference.log",
    benchmark:
        "logs/reference.tsv"
    conda:
        "../envs/blobpipe.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=minutes("difference", REACH),
    params:
        settings=settings("difference"),
    shell:
        "blobpipe difference --reference 2>&1 | tee {log} >&2"


rule difference:
    input:
        images=lambda wildcards: images(up_to(wildcards.batch)),
        blobs=CATALOGUE,
        bad_pixels=PARAMS.bad_pixels.files,
        frames=ancient("data/raw/frames.csv"),
        code=stages()["difference"].code,
    output:
        "data/difference/frames-{batch}.csv",
    log:
        "logs/difference-{batch}.log",
    benchmark:
        "logs/difference-{batch}.tsv"
    group:
        "batch"
    conda:
        "../envs/blobpipe.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=minutes("difference", BATCH + REACH),
    params:
        settings=settings("difference"),
        rows=lambda wildcards: up_to(wildcards.batch),
    shell:
        "blobpipe difference --batch {wildcards.batch} 2>&1 | tee {log} >&2"


STAGE_FILES["difference"] = [*map(str, rules.reference.output), *each_batch("data/difference/frames-{batch}.csv")]
