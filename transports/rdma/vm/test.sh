#!/bin/bash
# test.sh [ARGUMENTS]: builds the crate's tests and runs them in an emulated machine with Soft-RoCE; arguments are those of
# a test program (a filter, --nocapture). Status 0: all passed. 77: skipped, something is not installed. One to three minutes.
set -euo pipefail
. "$(dirname "$0")/common.sh"
require_rdma_packages
make_kernel

profile=${PROFILE:-release}
programs=()
while read -r program; do
    name=$(basename "$program")
    programs+=(-b "$program:/tests/${name%-*}")
done < <(test_programs test --lib --tests --no-run --profile "$profile")
echo "$*" > "$WORK/arguments"
make_rdma_initramfs "$WORK/test.cpio" -f "$VM/inside/test:/test" -f "$WORK/arguments:/arguments" "${programs[@]}"
"$NESTED/boot.sh" -k "$WORK/vmlinux" -i "$WORK/test.cpio" -t "${TIMEOUT:-600}"
