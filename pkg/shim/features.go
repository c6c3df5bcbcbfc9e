package shim

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/runtime-spec/specs-go/features"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
)

// featuresURL is the name containerd gives to the type.
const featuresURL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

// ociFeatures is the truth about what a container in a guest gets: what is not
// listed is refused or has no effect.
func ociFeatures() features.Features {
	yes, no := new(true), new(false)
	f := features.Features{
		OCIVersionMin: "1.0.0",
		OCIVersionMax: "1.3.0",
		Hooks:         []string{"prestart", "createRuntime", "poststart", "poststop"},
		MountOptions: []string{
			"async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "mand",
			"noatime", "nodev", "nodiratime", "noexec", "nomand", "norelatime", "nostrictatime",
			"nosuid", "private", "rbind", "relatime", "remount", "ro", "rprivate", "rslave",
			"rw", "slave", "strictatime", "suid", "sync", "tmpcopyup",
		},
		Linux: &features.Linux{
			Namespaces:   []string{"cgroup", "ipc", "mount", "network", "pid", "uts"},
			Capabilities: capabilities(),
			Cgroup:       &features.Cgroup{V1: yes, V2: yes, Systemd: yes, SystemdUser: no, Rdma: no},
			Seccomp: &features.Seccomp{
				Enabled: yes,
				Actions: []string{
					"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
					"SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
				},
				Operators: []string{
					"SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
					"SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
				},
			},
			Apparmor:        &features.Apparmor{Enabled: no},
			Selinux:         &features.Selinux{Enabled: no},
			IntelRdt:        &features.IntelRdt{Enabled: no},
			MountExtensions: &features.MountExtensions{IDMap: &features.IDMap{Enabled: no}},
			NetDevices:      &features.NetDevices{Enabled: no},
		},
		PotentiallyUnsafeConfigAnnotations: []string{"io.vmshim."},
	}
	// Enforced by the host, from Linux 5.12 on.
	if err := unix.MountSetattr(-1, "", 0, &unix.MountAttr{}); !errors.Is(err, unix.ENOSYS) {
		f.MountOptions = append(f.MountOptions, "rro", "rrw")
	}
	return f
}

func capabilities() []string {
	return []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID",
		"CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE",
		"CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW",
		"CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
		"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE",
		"CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE",
		"CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE",
		"CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ",
		"CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
	}
}

func featuresAny() (*anypb.Any, error) {
	text, err := json.Marshal(ociFeatures())
	if err != nil {
		return nil, fmt.Errorf("encode features: %w", err)
	}
	return &anypb.Any{TypeUrl: featuresURL, Value: text}, nil
}
