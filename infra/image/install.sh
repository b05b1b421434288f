#!/bin/sh
# What the Dockerfile's builder runs: install.sh requirements EXTRAS | dependencies TORCH_INDEX WEIGHTS | package. /layers/NAME then holds what the runtime copies as
# a layer of its own: torch (large, seldom new), dependencies, package (small, often new).
set -eu

VENV=/opt/graftwork
SITE=$VENV/lib/python$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages
# What is there for torch alone: its wheels, what only they ask for, and the compiler and NVIDIA's libraries of its CUDA build.
TORCHS="torch torch-* torchgen functorch torchvision torchvision-* torchvision.libs sympy sympy-* mpmath mpmath-* networkx networkx-*
  triton triton-* nvidia nvidia_* cuda cuda_*"

pip() { /opt/pip/bin/pip --python "$VENV/bin/python" "$@"; }

# requirements EXTRAS: what pyproject.toml asks for, in a file of its own: what is built of it stays while other lines there change.
requirements() {
  python3 - "$1" >requirements.txt <<'END'
import sys
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
unknown = [name for name in sys.argv[1].split() if name not in extras]
if unknown:
    sys.exit(f"EXTRAS: there is no {unknown[0]}; there are {', '.join(extras)}")
print("\n".join(project["dependencies"] + [line for name in sys.argv[1].split() for line in extras[name]]))
END
}

# dependencies TORCH_INDEX WEIGHTS
dependencies() {
  # --no-deps, since PyTorch's own indexes have not all the rest. torch==2.14.1 there is 2.14.1+cpu, with which what follows is content.
  pip install --no-compile --no-deps --index-url "$1" --constraint constraints.txt torch torchvision
  # Without the package itself: these layers stay the same while the code changes.
  # shellcheck disable=SC2086  # WEIGHTS are several
  pip install --no-compile --constraint constraints.txt --requirement requirements.txt $2
  pip check
  "$VENV/bin/python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  mkdir -p "/layers/torch$SITE" /layers/dependencies/opt
  for name in $TORCHS; do
    for path in "$SITE"/$name; do
      [ ! -e "$path" ] || mv "$path" "/layers/torch$SITE/"
    done
  done
  trim "$SITE"
  mv "$VENV" /layers/dependencies/opt/
}

# What no step reads: 0.4 of 1.1 GB. torch and its libraries are left as they are.
trim() (
  cd "$1"
  find . -depth -type d \( -name tests -o -name __pycache__ \) -exec rm -rf {} +
  # Sources of what is compiled, types for checkers, lists of what a wheel was made of.
  find . -type f \( -name '*.c' -o -name '*.cc' -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.pyx' -o -name '*.pyx.tp' -o -name '*.pxd' -o \
    -name '*.pxi' -o -name '*.pyi' -o -path '*/sboms/*' \) -delete
  rm -rf mlflow/server/js                           # the pages of MLflow's server, which has an image of its own
  rm -rf great_expectations/render/view/static/images  # pictures for pages that no step writes
  rm -rf timm/data/_info                            # the names of ImageNet's classes
  rm -rf sklearn/datasets/images matplotlib/mpl-data/sample_data
  # For PDF and PostScript; reports are HTML and PNG. matplotlib imports the names of glyphs in any case.
  rm -rf matplotlib/mpl-data/fonts/afm matplotlib/mpl-data/fonts/pdfcorefonts
  find fontTools -mindepth 1 -maxdepth 1 ! -name __init__.py ! -name agl.py ! -name misc -exec rm -r {} +
  rm -rf hf_xet hf_xet-*                            # a faster way to a hub's files, without which huggingface_hub takes the plain one
  rm -f pyarrow/*flight*                            # pyarrow's network protocol
  for library in pyarrow/lib*.so.*.*.*; do          # a wheel has no links: the same library lies there under two names, or three
    for copy in pyarrow/lib*; do
      if [ "$copy" != "$library" ] && cmp --silent "$copy" "$library"; then ln -sf "$(basename "$library")" "$copy"; fi
    done
  done
  for copy in scipy.libs/*; do                      # one build of a compiler's library, by the hash in its name
    library=numpy.libs/$(basename "$copy")
    if [ -e "$library" ] && cmp --silent "$copy" "$library"; then ln -sf "../$library" "$copy"; fi
  done
  for service in botocore/data/*/; do               # of AWS, S3 and what gives its credentials
    case $(basename "$service") in s3 | sts | sso | sso-oidc | signin) ;; *) rm -r "$service" ;; esac
  done
  # Symbols for debuggers. What auditwheel has put into *.libs is left: its tables are laid so that strip breaks them.
  find . -name '*.so*' -type f ! -path './*.libs/*' -exec strip --strip-unneeded {} +
)

package() {
  pip install --no-compile --no-deps .
  mkdir -p /layers/package/opt
  mv "$VENV" /layers/package/opt/
}

case $1 in
  requirements) requirements "$2" ;;
  dependencies) dependencies "$2" "$3" ;;
  package) package ;;
esac
