#!/bin/bash
# Two emulated machines with Soft-RoCE and a cable between them: pages are written from one into the other, which is then reset, and
# the first has to notice. Status as of test.sh; about a minute.
set -euo pipefail
. "$(dirname "$0")/common.sh"
require_rdma_packages
make_kernel

program=$(test_programs build --release --example two_hosts | tail -n 1)
MODULES+=(virtio_pci virtio_net)
make_rdma_initramfs "$WORK/two.cpio" -f "$VM/inside/two-hosts:/test" -b "$program:/bin/two_hosts"

cable=$(mktemp -d)
trap 'rm -rf "$cable"' EXIT
boot() { # ROLE MAC NETDEV
    "$NESTED/boot.sh" -k "$WORK/vmlinux" -i "$WORK/two.cpio" -m 1024 -t "${TIMEOUT:-180}" -a "ROLE=$1" -- \
        -netdev "stream,id=cable,addr.type=unix,addr.path=$cable/socket,$3" \
        -device "virtio-net-pci,netdev=cable,mac=$2,romfile=" 2>&1 | sed "s/^/$1: /"
}
boot receiver 52:54:00:00:00:01 server=on > "$cable/receiver" &
while [ ! -S "$cable/socket" ] && kill -0 $! 2>/dev/null; do sleep 0.1; done
boot sender 52:54:00:00:00:02 server=off || status=$?
wait $! || true # It is reset before it can say how it went: what it has received is checked below.
cat "$cable/receiver"
grep -q "MiB arrived" "$cable/receiver" && exit "${status:-0}"
