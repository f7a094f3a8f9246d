# Shared by the scripts beside it: where things are, and what must be installed. Sourced, not run.

NESTED=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$NESTED/../../.." && pwd)
WORK=${NESTED_WORK:-$ROOT/target/nested}

# Exit status that says "nothing was tested": test runners count it as skipped, not as passed.
SKIPPED=77

# What the scripts need, and the Debian package that brings it.
declare -A PACKAGE_OF=(
    [qemu-system-x86_64]=qemu-system-x86
    [busybox]=busybox-static
    [cpio]=cpio
    [modprobe]=kmod
    [xz]=xz-utils
)

newest_kernel() {
    ls /boot/vmlinuz-* 2>/dev/null | grep -v cloud | sort -V | tail -n 1
}

# Ends the script as skipped when something is missing, with the one line that installs it.
require_packages() {
    local tool missing=()
    for tool in "${!PACKAGE_OF[@]}"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || missing+=("${PACKAGE_OF[$tool]}")
    done
    [ -n "$(newest_kernel)" ] || missing+=(linux-image-amd64)
    if [ ${#missing[@]} -gt 0 ]; then
        echo "skipped: missing Debian packages: ${missing[*]}"
        echo "install them with: apt-get install -y --no-install-recommends ${missing[*]}"
        exit $SKIPPED
    fi
    if ldd "$(command -v busybox)" >/dev/null 2>&1; then
        echo "skipped: busybox is dynamically linked; install busybox-static in its place"
        exit $SKIPPED
    fi
}

# Unpacks the newest kernel, once, for the emulated machine and for the guest in it.
make_kernel() {
    local image
    image=$(newest_kernel)
    KERNEL_VERSION=${image#/boot/vmlinuz-}
    mkdir -p "$WORK"
    # An image's date is that of its making, so that a newer kernel may be older than what was unpacked of another.
    if [ ! "$WORK/vmlinux" -nt "$image" ] || [ "$(cat "$WORK/vmlinux.version" 2>/dev/null)" != "$KERNEL_VERSION" ]; then
        "$NESTED/vmlinux.sh" "$image" "$WORK/vmlinux"
        echo "$KERNEL_VERSION" >"$WORK/vmlinux.version"
    fi
}

# The initial RAM disk of the guest that migrates.
make_guest_initramfs() {
    "$NESTED/initramfs.sh" -o "$WORK/guest.cpio" -i "$NESTED/inside/guest-init"
}

# The initial RAM disk of the emulated machine: the guest's RAM disk, and what the arguments add.
make_machine_initramfs() {
    "$NESTED/initramfs.sh" -o "$WORK/machine.cpio" -i "$NESTED/inside/init" -k "$KERNEL_VERSION" \
        -m irqbypass -m kvm -m ccp -m kvm-amd \
        -f "$WORK/guest.cpio:/guest/initramfs" "$@"
}
