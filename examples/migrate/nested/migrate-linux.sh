#!/bin/bash
# Boots Debian's Linux in the emulated machine by `migrate send --kernel --initrd` and moves it to a second process,
# `migrate receive`, while it writes and checks files. What is proved is said in inside/migrate-linux.
# Status 0: all was right. 77: skipped, something is not installed. One to three minutes.
set -euo pipefail
. "$(dirname "$0")/common.sh"
require_packages
make_kernel
make_guest_initramfs

# Emulated twice over, an unoptimised program would be slower than the link: release unless PROFILE=dev says otherwise.
profile=${PROFILE:-release}
(cd "$ROOT" && cargo build -p migrate --profile "$profile")
binary=${CARGO_TARGET_DIR:-$ROOT/target}/${profile/#dev/debug}/migrate
make_machine_initramfs -b "$binary:/bin/migrate" -f "$NESTED/inside/migrate-linux:/test" \
    -f "$WORK/vmlinux:/guest/kernel"
"$NESTED/boot.sh" -k "$WORK/vmlinux" -i "$WORK/machine.cpio" -t "${TIMEOUT:-600}"
