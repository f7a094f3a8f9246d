#!/bin/bash
# throughput.sh [MIB [TURNS]]: lanes with one-sided writes against plain RDMA writes, in an emulated machine with Soft-RoCE. Times
# mean nothing there: they are instructions, one a nanosecond, unless CLOCK=host is set. The ratio does. Status as of test.sh.
set -euo pipefail
. "$(dirname "$0")/common.sh"
require_rdma_packages
make_kernel

program=$(test_programs build --release --example throughput | tail -n 1)
echo "$*" > "$WORK/arguments"
make_rdma_initramfs "$WORK/throughput.cpio" -f "$VM/inside/throughput:/test" -f "$WORK/arguments:/arguments" \
    -b "$program:/bin/throughput"
clock=(-n)
[ "${CLOCK:-}" = host ] && clock=()
"$NESTED/boot.sh" ${clock[@]+"${clock[@]}"} -k "$WORK/vmlinux" -i "$WORK/throughput.cpio" -t "${TIMEOUT:-600}"
