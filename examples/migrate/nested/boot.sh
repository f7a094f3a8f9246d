#!/bin/bash
# boot.sh -k VMLINUX -i INITRAMFS [-m MEMORY_MIB] [-c VCPUS] [-t TIMEOUT_S] [-a "KERNEL ARGUMENTS"] [-n] [-- QEMU ARGUMENTS...]
# Boots a machine with a KVM of its own under QEMU's emulator, which implements AMD's virtualization (SVM) in
# software: the host needs no /dev/kvm. Its console goes to stdout. The exit status is the one its init printed
# ("NESTED-STATUS n"), 124 when TIMEOUT_S has passed, 125 when the machine ended without a word.
# A kernel that finds its own stack overwritten is booted once more, and that is said: no program can do that to it, but the
# emulator's threads have (seen once, in a thread that was running a nested guest).
# -n: time in the machine passes by the instructions that it executes, one a nanosecond, on one vCPU: what is measured there
# comes out alike however busy the host is.
set -uo pipefail

kernel= initramfs= memory=2048 vcpus=2 timeout=300 arguments= clock=(-accel tcg,thread=multi)
while getopts k:i:m:c:t:a:n option; do
    case $option in
        k) kernel=$OPTARG ;;
        i) initramfs=$OPTARG ;;
        m) memory=$OPTARG ;;
        c) vcpus=$OPTARG ;;
        t) timeout=$OPTARG ;;
        a) arguments=$OPTARG ;;
        n) clock=(-accel tcg,thread=single -icount shift=0,sleep=off) vcpus=1 ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))

# qemu64 and not max: fewer features to emulate make everything faster. tsc=reliable: the emulated TSC is one clock
# for all vCPUs, but the kernel's watchdog distrusts it when the host is busy. no_timer_check: so does its test of the timer, and panics.
console="console=ttyS0 quiet panic=-1 reboot=t no_timer_check tsc=reliable mitigations=off random.trust_cpu=on"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for attempt in 1 2; do
    timeout -k 5 "$timeout" qemu-system-x86_64 \
        "${clock[@]}" -machine q35 -cpu qemu64,+svm,+npt -smp "$vcpus" -m "$memory" \
        -nodefaults -no-user-config -nographic -no-reboot -serial stdio \
        -kernel "$kernel" -initrd "$initramfs" -append "$console $arguments" "$@" </dev/null 2>&1 | tr -d '\r' | tee "$log"
    emulator=${PIPESTATUS[0]}
    if [ "$attempt" = 1 ] && grep -q 'Kernel panic - not syncing: corrupted stack end detected inside scheduler' "$log"; then
        echo "boot.sh: the emulated machine's kernel has crashed over its own stack; once more" >&2
        continue
    fi
    break
done
status=$(sed -n 's/^.*NESTED-STATUS \([0-9]*\).*$/\1/p' "$log" | tail -n 1)
if [ -z "$status" ] && [ "$emulator" = 124 ]; then
    echo "boot.sh: the machine was not done after $timeout s" >&2
    exit 124
elif [ -z "$status" ]; then
    echo "boot.sh: the machine ended before its init said how; QEMU's status is $emulator" >&2
    exit 125
fi
exit "$status"
