# syntax=docker/dockerfile:1
# gdro for the CPU or for CUDA; docs/containers.md says how to build and run it. One stage: nothing is compiled, and the
# source is mounted, so no layer holds it.

# The wheels of torch bring CUDA; for GPUs take a base whose settings let the driver in: nvidia/cuda:13.0.1-base-ubuntu24.04
ARG BASE=ubuntu:24.04
# hadolint ignore=DL3006
FROM ${BASE}

# OpenCV, which PaddleOCR reads images with, needs the two libraries.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libgl1 libglib2.0-0t64 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/gdro
ENV PATH=/opt/gdro/bin:$PATH

# torch has a layer of its own: it is most of the image, and seldom changes. pip reads the address of a second index, such
# as the one with torch's CPU builds, from this argument.
ARG PIP_EXTRA_INDEX_URL=
RUN --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    pip install --no-cache-dir -c /constraints.txt torch
ARG EXTRAS=serve
RUN --mount=type=bind,target=/src \
    pip install --no-cache-dir -c /src/constraints.txt "/src[${EXTRAS}]"

RUN useradd --create-home --uid 10001 gdro && install --directory --owner=gdro /data
USER 10001
WORKDIR /data
ENTRYPOINT ["gdro"]
CMD ["--help"]
