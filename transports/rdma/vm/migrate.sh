#!/bin/bash
# migrate.sh [ARGUMENTS]: `migrate demo --transport rdma` with a process guest and with a KVM guest, in an emulated machine that
# has both Soft-RoCE and KVM; arguments are added to it. Status as of test.sh. One or two minutes, and the time to build.
set -euo pipefail
. "$(dirname "$0")/common.sh"
require_rdma_packages
make_kernel

(cd "$ROOT" && cargo build -p migrate --release --features rdma)
MODULES+=(irqbypass kvm ccp kvm-amd)
echo "$*" > "$WORK/arguments"
make_rdma_initramfs "$WORK/migrate.cpio" -f "$VM/inside/migrate:/test" -f "$WORK/arguments:/arguments" \
    -b "${CARGO_TARGET_DIR:-$ROOT/target}/release/migrate:/bin/migrate"
"$NESTED/boot.sh" -k "$WORK/vmlinux" -i "$WORK/migrate.cpio" -t "${TIMEOUT:-600}"
