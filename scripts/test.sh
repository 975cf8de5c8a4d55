#!/usr/bin/env bash
# Makes or reuses the virtual environment, installs the dev extra, then lints, type-checks, builds the docs and tests.
# Arguments go to pytest: bash scripts/test.sh tests/objectives -k taid
# With -m slow it runs what takes minutes more: the same checks under more launchers and stages.
set -euo pipefail
source "$(dirname "$0")/venv.sh"
install_into_venv dev
export HF_HUB_OFFLINE=1
ruff format --check .
ruff check .
pyright --pythonpath "$VENV/bin/python"
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
pytest -n 2 --dist loadfile "$@"
