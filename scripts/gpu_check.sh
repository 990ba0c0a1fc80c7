#!/usr/bin/env bash
# Builds, tests and measures Taskloom on the GPU that is here, without a network, within nine minutes; docs/gpu.md says how to read it.
#
#   scripts/gpu_check.sh OUTDIR [--dry-run] [--seconds N] [--sections build,tests,...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python3}" "$root/benchmarks/gpu_check" "$@"
