# Sourced by the other scripts: a virtual environment ($VLM_TAID_VENV, else .venv) with vlm_taid and what it needs.
# install_into_venv EXTRA... installs the package with extras, and again only when pyproject.toml has changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VLM_TAID_VENV:-.venv}"

install_into_venv() {
    local wanted="${*:-base}" python=python3 stamp
    if ! command -v "$python" >/dev/null || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is needed as python3 on the PATH." >&2
        return 1
    fi
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV" || return 1
    VENV="$(cd "$VENV" && pwd)"
    stamp="$VENV/.vlm_taid-$(tr -c 'a-z0-9\n' - <<<"$wanted")"
    if [ ! -f "$stamp" ] || ! cmp -s <(cat pyproject.toml; pwd) "$stamp"; then
        echo "Installing vlm_taid and what it needs into $VENV (PyTorch is large: some minutes the first time) ..."
        "$VENV/bin/pip" install --quiet --disable-pip-version-check -e ".${*:+[$(IFS=,; echo "$*")]}" || return 1
        (cat pyproject.toml; pwd) >"$stamp"
    fi
    export PATH="$VENV/bin:$PATH"
}
