package qemu

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares lines with a file in testdata, or writes it.
func golden(t *testing.T, name string, lines []string) {
	t.Helper()
	path := filepath.Join("testdata", name+".txt")
	got := strings.Join(lines, "\n") + "\n"
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("%s (-update writes it):\n%s", path, diff)
	}
}

type argsCase struct {
	name   string
	spec   hypervisor.Spec
	cfg    Config
	host   Host
	option string // that the case is about
}

func spec(arch string, change ...func(*hypervisor.Spec)) hypervisor.Spec {
	s := hypervisor.Spec{
		Name: "sandbox", Arch: arch, VCPUs: 1, MaxVCPUs: 1, MemoryMiB: 256, MaxMemoryMiB: 256,
		Kernel: "/k/vmlinux", Initrd: "/k/initrd.img",
	}
	for _, f := range change {
		f(&s)
	}
	return s
}

func devices(s *hypervisor.Spec) {
	s.Shares = []hypervisor.Share{{Tag: "kataShared", Dir: "/s"}, {Tag: "other", Dir: "/o"}}
	s.Disks = []hypervisor.Disk{{ID: "root", Path: "/dev/sda", ReadOnly: true}, {ID: "data", Path: "/data.img"}}
}

func hotplug(s *hypervisor.Spec) {
	s.MaxVCPUs, s.MaxMemoryMiB = 8, 4097
	s.KernelParams = []string{"quiet=0", "agent.log=debug"}
}

func argsCases() []argsCase {
	host := func(arch, accelerator, vsock string) Host {
		machine := map[string]string{"amd64": "pc-q35-7.2", "arm64": "virt-7.2"}[arch]
		return Host{Arch: arch, Machine: machine, Accelerator: accelerator, Vsock: vsock}
	}
	return []argsCase{
		{"amd64-kvm-kernel", spec("amd64"), Config{}, host("amd64", KVM, VsockKernel), "vhost-vsock-pci,id=vsock0,bus=pcie.0,addr=0x4,vhostfd=7,guest-cid=4711"},
		{"amd64-tcg-vhost-user", spec("amd64"), Config{}, host("amd64", TCG, VsockVhostUser), "vhost-user-vsock-pci,id=vsock0,bus=pcie.0,addr=0x4,chardev=vsock"},
		{"amd64-kvm-devices", spec("amd64", devices), Config{CPU: "host,pmu=off"}, host("amd64", KVM, VsockKernel), "driver=host_device,node-name=disk0,filename=/dev/fdset/1,locking=off,read-only=on"},
		{"amd64-tcg-hotplug", spec("amd64", hotplug, devices), Config{}, host("amd64", TCG, VsockVhostUser), "virtio-mem-pci,id=hotmem0,bus=pcie.0,addr=0x5,memdev=hotmem,requested-size=0"},
		{"amd64-kvm-modules", spec("amd64", hotplug, func(s *hypervisor.Spec) { s.MemorySlots = 3 }), Config{}, host("amd64", KVM, VsockKernel), "size=256M,slots=3,maxmem=4096M"},
		{"amd64-tcg-comma", spec("amd64", func(s *hypervisor.Spec) { s.Name = "a,b=c" }), Config{}, host("amd64", TCG, VsockVhostUser), "guest=a,,b=c,debug-threads=on"},
		{"arm64-kvm-kernel", spec("arm64"), Config{}, host("arm64", KVM, VsockKernel), "virt-7.2,memory-backend=mem,dump-guest-core=off,mem-merge=off,usb=off,gic-version=max"},
		{"arm64-tcg-vhost-user", spec("arm64", hotplug, devices), Config{}, host("arm64", TCG, VsockVhostUser), "vhost-user-fs-pci,id=sharefs1,bus=pcie.0,addr=0x9,chardev=fs1,tag=other,queue-size=1024"},
	}
}

func TestArguments(t *testing.T) {
	for _, tt := range argsCases() {
		t.Run(tt.name, func(t *testing.T) {
			fd := descriptors{QMP: 3, Console: 4, Kernel: 5, Initrd: 6, Vsock: 7, Shares: []int{8, 9}, Disks: []diskDescriptor{{10, true}, {11, false}}}
			cid := uint32(0)
			if tt.host.Vsock == VsockKernel {
				cid = 4711
			}
			got := arguments(tt.spec, tt.cfg, tt.host, cid, fd)
			golden(t, tt.name, got)
			if !slices.Contains(got, tt.option) {
				t.Errorf("no %q", tt.option)
			}
		})
	}
}

func TestVirtiofsdArgs(t *testing.T) {
	share := hypervisor.Share{Tag: "kataShared", Dir: "/run/a,b"}
	for _, dialect := range []string{DialectC, DialectRust} {
		for _, cache := range []string{"", "never"} {
			name := "virtiofsd-" + dialect
			if cache != "" {
				name += "-" + cache
			}
			t.Run(name, func(t *testing.T) { golden(t, name, virtiofsdArgs(dialect, cache, share, 3, 524288)) })
		}
	}
}

// The last of two equal parameters wins in the kernel, so the operator's are
// behind ours.
func TestKernelParamsOrder(t *testing.T) {
	s := spec("amd64")
	s.KernelParams = []string{"panic=0", "x"}
	got := kernelParams(s, TCG)
	if n := len(got); !slices.Equal(got[n-3:], []string{"vmshim.ready=cid", "panic=0", "x"}) {
		t.Errorf("params end with %q", got[n-3:])
	}
}

func TestSlotsDoNotMeet(t *testing.T) {
	if shareSlot+maxShares > diskSlot || diskSlot+maxDisks-1 > lastSlot || memorySlot >= shareSlot {
		t.Error("two devices would share a slot")
	}
}
