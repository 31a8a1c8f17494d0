# syntax=docker/dockerfile:1
# Three images from one file: operator and prepare (no torch), trainer (train, and publish where it merges).
#
#   docker build --target operator -t …/finetune-operator .
#   docker build --target prepare  -t …/finetune-prepare  .
#   docker build --target trainer  -t …/finetune-trainer  .
#
# Each is: the Python base, one layer of locked third-party packages (it changes with images/requirements-*.txt only),
# one small layer of our code. So a change of our code rebuilds and moves kilobytes, not torch.

ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG UV_VERSION=0.13.9

FROM ${BASE_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PATH=/app/.venv/bin:/usr/local/bin:/usr/bin:/bin
WORKDIR /app
RUN echo 'nonroot:x:65532:65532:nonroot:/work/home:/usr/sbin/nologin' >> /etc/passwd \
 && echo 'nonroot:x:65532:' >> /etc/group
COPY images/install.sh /app/install.sh

FROM base AS operator
ARG UV_VERSION
COPY images/requirements-operator.txt /app/requirements.txt
RUN --mount=type=cache,target=/root/.cache/uv sh /app/install.sh ${UV_VERSION}
COPY api/finetune_api /app/finetune_api
COPY operator/finetune_operator /app/finetune_operator
RUN python -m compileall -q /app/finetune_api /app/finetune_operator
USER 65532:65532
ENTRYPOINT ["python", "-m", "finetune_operator"]

FROM base AS prepare
ARG UV_VERSION
COPY images/requirements-prepare.txt /app/requirements.txt
RUN --mount=type=cache,target=/root/.cache/uv sh /app/install.sh ${UV_VERSION}
COPY api/finetune_api /app/finetune_api
COPY trainer/finetune_trainer /app/finetune_trainer
RUN python -m compileall -q /app/finetune_api /app/finetune_trainer
USER 65532:65532
ENTRYPOINT ["python", "-m", "finetune_trainer"]

FROM base AS trainer
ARG UV_VERSION
# OpenMP's threads spin at barriers by default: on cores that are shared that costs a factor of five.
ENV OMP_WAIT_POLICY=PASSIVE
ENV FINETUNE_LM_EVAL=/app/lm-eval
COPY images/requirements-trainer.txt /app/requirements.txt
COPY images/requirements-tasks.txt /app/requirements-tasks.txt
RUN --mount=type=cache,target=/root/.cache/uv sh /app/install.sh ${UV_VERSION}
COPY api/finetune_api /app/finetune_api
COPY trainer/finetune_trainer /app/finetune_trainer
RUN python -m compileall -q /app/finetune_api /app/finetune_trainer
USER 65532:65532
ENTRYPOINT ["python", "-m", "finetune_trainer"]
