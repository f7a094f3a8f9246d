# Shared by the scripts beside it. Sourced, not run. The emulated machine itself is the one of examples/migrate/nested;
# here it gets Soft-RoCE (rdma_rxe), an RDMA device made of software, which most hosts' kernels lack.

VM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CRATE=$(cd "$VM/.." && pwd)
. "$VM/../../../examples/migrate/nested/common.sh"
WORK=${NESTED_WORK:-$ROOT/target/rdma-vm}

PACKAGE_OF+=([rdma]=iproute2 [ip]=iproute2)

# The InfiniBand core, its ways to user space, and the software device with the checksum that it looks up by name.
# dummy: rdma_cm over rxe on "lo" fails.
MODULES=(crc32_generic rdma_rxe ib_uverbs rdma_ucm dummy)

# librxe is opened by libibverbs at run time, so that the list of a program's libraries does not name it.
provider() { ls /usr/lib/*/libibverbs/librxe-rdmav*.so 2>/dev/null | head -n 1; }

# What building the crate needs, and what running it needs; see the crate's README.
require_rdma_packages() {
    local missing=()
    require_packages
    [ -n "$(provider)" ] || missing+=(ibverbs-providers)
    for library in libibverbs librdmacm; do
        pkg-config --exists "$library" 2>/dev/null || missing+=("$library-dev")
    done
    command -v pkg-config >/dev/null || missing+=(pkg-config)
    ls /usr/lib/llvm-1[0-5]/lib/libclang*.so* >/dev/null 2>&1 || missing+=(libclang-14-dev)
    if [ ${#missing[@]} -gt 0 ]; then
        echo "skipped: missing Debian packages: ${missing[*]}"
        echo "install them with: apt-get install -y --no-install-recommends ${missing[*]}"
        exit $SKIPPED
    fi
}

# make_rdma_initramfs OUT ARGUMENTS...: the initial RAM disk of a machine with Soft-RoCE; arguments as of initramfs.sh.
make_rdma_initramfs() {
    local out=$1 library tool arguments=()
    shift
    for module in "${MODULES[@]}"; do arguments+=(-m "$module"); done
    library=$(provider)
    for tool in rdma ip; do arguments+=(-b "$(PATH=$PATH:/usr/sbin:/sbin command -v $tool):/usr/bin/$tool"); done
    "$NESTED/initramfs.sh" -o "$out" -i "$NESTED/inside/init" -k "$KERNEL_VERSION" "${arguments[@]}" \
        -b "$library:$library" -f /etc/libibverbs.d/rxe.driver:/etc/libibverbs.d/rxe.driver \
        -f "$VM/inside/rxe:/rxe" "$@"
}

# test_programs ARGUMENTS...: builds, and prints the path of each program; arguments as of cargo.
test_programs() {
    cargo "$@" --message-format=json-render-diagnostics --manifest-path "$CRATE/Cargo.toml" |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
}
