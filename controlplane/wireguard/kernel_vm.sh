#!/bin/bash
# kernel_vm.sh [KERNEL.deb]: runs the tunnel tests against the kernel's WireGuard.
#
# For machines whose own kernel lacks the module: boots a Debian cloud kernel
# under QEMU's emulator (no KVM needed) with an initramfs that holds busybox,
# the modules and the test binary. Without an argument the package
# linux-image-cloud-amd64 is downloaded with apt-get.
#
# Needs: qemu-system-x86 busybox-static cpio kmod dpkg go. Takes a minute or two.
# Exit status 0: all tests passed in the VM.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

deb=${1:-}
if [ -z "$deb" ]; then
	pkg=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends:/ {print $2; exit}')
	(cd "$work" && apt-get download -q "$pkg")
	deb=$(echo "$work"/*.deb)
fi
dpkg -x "$deb" "$work/kernel"
version=$(basename "$work"/kernel/boot/vmlinuz-* | sed 's/^vmlinuz-//')

root=$work/root
mkdir -p "$root"/{bin,proc,sys,dev,tmp,run,var,lib/modules/"$version"}
ln -s ../run "$root/var/run"
cp "$(command -v busybox)" "$root/bin/busybox"
for tool in sh mount modprobe ip poweroff uname; do ln -s busybox "$root/bin/$tool"; done

# The modules the tests need, with what those need.
cp "$work/kernel/lib/modules/$version"/modules.{order,builtin,builtin.modinfo} "$root/lib/modules/$version/"
depmod -b "$work/kernel" "$version"
for module in wireguard tun veth dummy; do
	modprobe -d "$work/kernel" -S "$version" --show-depends "$module" 2>/dev/null | awk '$1 == "insmod" {print $2}'
done | sort -u | while read -r file; do
	rel=${file#"$work/kernel/"}
	mkdir -p "$root/$(dirname "$rel")"
	cp "$file" "$root/$rel"
	case $rel in
	*.xz) xz -d "$root/$rel" ;;
	*.zst) zstd -dq --rm "$root/$rel" ;;
	esac
done
depmod -b "$root" "$version"

(cd "$here" && CGO_ENABLED=0 go test -c -o "$root/bin/wireguard.test" .)

cat > "$root/init" <<'INIT'
#!/bin/sh
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
mount -t tmpfs t /tmp; mount -t tmpfs r /run
for m in wireguard tun veth dummy; do modprobe $m; done
echo "kernel $(uname -r)"
export WIREGUARD_TEST_MODE=kernel WIREGUARD_TEST_SLOW=1 HOME=/tmp
if wireguard.test -test.v -test.timeout 10m -test.run 'TestTunnelStory|TestChangesDoNot|TestRestart|TestAdopt|TestDeletedInterfaceComesBack|TestTaken|TestManyPeers'; then
	echo "VM: all passed"
fi
poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1 > "$work/initramfs")

timeout 900 qemu-system-x86_64 -accel tcg -cpu max -m 1024 -smp 2 -nographic -no-reboot -nic none \
	-kernel "$work"/kernel/boot/vmlinuz-* -initrd "$work/initramfs" \
	-append "console=ttyS0 quiet panic=-1" < /dev/null | tee "$work/console"
grep -q '^VM: all passed' "$work/console"
