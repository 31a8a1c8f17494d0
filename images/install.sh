#!/bin/sh
# Installs locked requirements into /app/.venv with uv, which itself does not stay in the image.
# Bytecode is compiled because the containers' root is read-only: without it every start would compile torch anew.
set -eu
python3 -m venv /tmp/uv
/tmp/uv/bin/pip install --no-cache-dir --quiet --disable-pip-version-check "uv==$1"
/tmp/uv/bin/uv venv --quiet /app/.venv
UV_LINK_MODE=copy /tmp/uv/bin/uv pip install --quiet --system-certs --python /app/.venv \
  --require-hashes --compile-bytecode -r /app/requirements.txt
# lm-eval, in a folder of its own: with scipy in sight transformers imports it in every training process.
if [ -f /app/requirements-tasks.txt ]; then
  UV_LINK_MODE=copy /tmp/uv/bin/uv pip install --quiet --system-certs --python /app/.venv --target /app/lm-eval \
    --no-deps --require-hashes --compile-bytecode -r /app/requirements-tasks.txt
fi
rm -rf /tmp/uv
