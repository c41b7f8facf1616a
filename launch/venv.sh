# shellcheck shell=bash
# Sourced by the other scripts, from the repository's root: make_venv [extra,...] makes $venv and installs the package with those extras,
# use_huge_pages sets GLIBC_TUNABLES.
venv=${CLIP_JAX_VENV:-.venv}

make_venv() {
  local extra=${1:-} python
  if [[ -n ${CLIP_JAX_LAUNCH:-} ]]; then return; fi # clip-jax launch: CLIP_JAX_PYTHON has the package
  local stamp=$venv/.clip_jax${extra:+_$extra}
  if [[ $stamp -nt setup.py ]]; then return; fi
  for python in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    [[ -n $python ]] && command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    python=
  done
  if [[ -z $python ]]; then echo "error: no Python 3.11 or newer found (PYTHON=/path/to/python names one)" >&2; exit 2; fi
  echo "installing into $venv ..."
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  local package=.${extra:+[$extra]}
  uv_install "$package" || pip_of_venv install --quiet -e "$package"
  touch "$stamp"
}

pip_of_venv() { "$venv/bin/python" -m pip "$@" --disable-pip-version-check; }

# uv_install PACKAGE, such as .[dev]: uv takes about a sixth of pip's time. It does not read pip's settings, so it gets
# those that choose packages. Fails where there is another setting, or no uv; then pip installs.
uv_install() {
  local settings line key value word
  # All indexes are equal, as for pip. Where Python may not keep bytecode, every start would compile all modules again.
  local -a options=(--quiet --python "$venv/bin/python" --index-strategy unsafe-best-match ${PYTHONDONTWRITEBYTECODE:+--compile-bytecode})
  settings=$(pip_of_venv config list) || return 1
  while read -r line; do
    key=${line%%=*} value=${line#*=}
    value=${value//[\'\"]/}
    case ${key##*.} in
      index-url | extra-index-url | find-links | constraint) for word in ${value//\\n/ }; do options+=("--${key##*.}=$word"); done ;;
      cert) local -x SSL_CERT_FILE=${SSL_CERT_FILE:-$value} ;;
      '' | cache-dir | default-timeout | disable-pip-version-check | no-input | progress-bar | quiet | retries | root-user-action | timeout) ;;
      *) return 1 ;;
    esac
  done <<<"$settings"
  command -v uv >/dev/null || { pip_of_venv install --quiet --only-binary=uv uv && local PATH=$venv/bin:$PATH; } || return 1
  uv pip install "${options[@]}" -e "$1"
}

# glibc reads the variable when a process starts, so that a Python program cannot set it for itself. Huge pages save
# page faults (docs/launching.md). glibc knows the option since 2.35. A value that the user has given stays.
use_huge_pages() {
  local modes=${1:-/sys/kernel/mm/transparent_hugepage/enabled} library version
  [[ :${GLIBC_TUNABLES:-} != *:glibc.malloc.hugetlb=* ]] || return 0
  read -r library version 2>/dev/null < <(getconf GNU_LIBC_VERSION 2>/dev/null) || return 0
  [[ $library == glibc && $(printf '2.35\n%s\n' "$version" | sort -V | head -n 1) == 2.35 ]] || return 0
  [[ -r $modes && $(<"$modes") != *\[never\]* ]] || return 0
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1
}
