# blobpipe with the tested versions: for the daily commands, and, with a checkout mounted at /work, for the pipeline.
#
#   docker build -t blobpipe .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" blobpipe quicklook inbox
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" --entrypoint snakemake blobpipe --cores 2
#
# Untried: where this was written there was no Docker to build it with.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

# The packages first, so that a change of the code does not install them again
WORKDIR /opt/blobpipe
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src/blobpipe/__init__.py src/blobpipe/__init__.py
RUN pip install --no-cache-dir -c constraints.txt ".[workflow,serve,watch,mast,asdf]"
COPY src src
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# Caches of users that have no home
ENV HOME=/tmp NUMBA_CACHE_DIR=/tmp/numba MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["blobpipe"]
CMD ["--help"]
