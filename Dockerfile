# docker build --target curation -t registry.example.com/gristmill-curation:0.1.0 .
# docker build --target trainer  -t registry.example.com/gristmill-trainer:0.1.0 .
# One base and one layout for both, so that a head of the one and workers of the other have the same Python, which Ray demands.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 LC_ALL=C.UTF-8 LANG=C.UTF-8
# rsync: the Ray cluster launcher copies files with it; wget: KubeRay's probes call it; the boost libraries: lmplz
RUN apt-get update \
 && apt-get install -y --no-install-recommends rsync wget libboost-program-options1.74.0 libboost-system1.74.0 libboost-thread1.74.0 \
 && rm -rf /var/lib/apt/lists/* \
# both the launcher and KubeRay start Ray in a login shell, which forgets the image's PATH
 && echo 'export PATH=/opt/gristmill/bin:$PATH' > /etc/profile.d/gristmill.sh \
# 1000 owns the files that the launcher mounts on the usual machine images
 && useradd --uid 1000 --create-home gristmill
# HOME by name: the launcher reads it from the image, to know where to mount
ENV HOME=/home/gristmill PATH=/opt/gristmill/bin:$PATH
WORKDIR /app

FROM base AS kenlm
COPY tools/build_kenlm.sh tools/
RUN tools/build_kenlm.sh

FROM base AS build
RUN python -m venv /opt/gristmill
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY filters filters
COPY stages stages
COPY pipeline pipeline
COPY trainer trainer

# ray[default]: the job server and the autoscaler, which Ray's own wheel leaves out; boto3: the autoscaler on AWS
FROM build AS curation-build
RUN /opt/gristmill/bin/pip install --no-cache-dir --constraint constraints.txt '.[s3]' 'ray[default]' boto3

FROM build AS trainer-build
RUN /opt/gristmill/bin/pip install --no-cache-dir --constraint constraints.txt '.[train,s3]' 'ray[default]' boto3

FROM base AS curation
COPY --from=kenlm /app/.kenlm/bin /usr/local/bin
COPY --from=curation-build /opt/gristmill /opt/gristmill
COPY configs configs
COPY models models
COPY samples samples
RUN chown gristmill /app
USER 1000
CMD ["gristmill", "--help"]

# torch's wheel brings CUDA along; of the host only the driver is needed, which NVIDIA's container toolkit mounts
FROM base AS trainer
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# the one compiler in an image: flex_attention is compiled on the GPU by Triton, which builds its launcher with gcc
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=trainer-build /opt/gristmill /opt/gristmill
COPY configs configs
RUN chown gristmill /app
USER 1000
CMD ["gristmill", "--help"]
