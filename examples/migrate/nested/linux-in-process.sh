#!/bin/bash
# linux-in-process.sh [bzimage]
# Boots Linux under the example VMM in the emulated machine, and moves it four times to a second machine of the
# same process while it writes files: the unit test `a_running_linux_guest_goes_on_in_another_machine`.
set -euo pipefail
. "$(dirname "$0")/common.sh"
require_packages
make_kernel
make_guest_initramfs
guest_kernel=$WORK/vmlinux
# The other way in: the 64-bit Linux boot protocol in place of PVH.
[ "${1:-}" = bzimage ] && guest_kernel=$(newest_kernel)

cd "$ROOT"
test_binary=$(cargo test -p migrate --bin migrate --no-run 2>&1 | tee /dev/stderr |
    sed -n 's/.*Executable.*(\(.*\))$/\1/p')
cat > "$WORK/test" <<'T'
export PAGEFERRY_TEST_KERNEL=/guest/kernel PAGEFERRY_TEST_INITRD=/guest/initramfs
exec /bin/migrate-test --nocapture a_running_linux_guest
T
make_machine_initramfs -b "$(realpath "$test_binary"):/bin/migrate-test" \
    -f "$WORK/test:/test" -f "$guest_kernel:/guest/kernel"
"$NESTED/boot.sh" -k "$WORK/vmlinux" -i "$WORK/machine.cpio" -t "${TIMEOUT:-600}"
