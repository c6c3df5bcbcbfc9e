package agent_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
)

var guestRows = []row{
	{31, "ReseedRNG", "ReseedRandomDev", "kprobes: the kernel mixes the host's bytes in, then makes a new key; where QEMU emulates, clones of a snapshot draw the same numbers before the call, others after (a kernel without kprobes: only that an empty seed is refused)", proveReseedRNG, with[noReseedRNG]},
	{36, "GuestDetails", "GetGuestDetails", "block size and probe file equal sysfs; the agent's process is a child of the first one", proveGuestDetails, with[noGuestDetails]},
	{37, "SetGuestDateTime", "SetGuestDateTime", "the guest's clock is set to an hour ago and back, each within 50 ms", proveSetGuestDateTime, with[noSetGuestDateTime]},
	{38, "CopyFile", "CopyFile", "bytes, mode, owner, links in the guest; .. and links out are refused and nothing is there", proveCopyFile, with[noCopyFile]},
	{45, "Metrics", "GetMetrics", "parses; memory and open files equal /proc, and move with it", proveMetrics, with[noMetrics]},
	{52, "SetPolicy", "SetPolicy", "UNIMPLEMENTED", proveSetPolicy, with[noSetPolicy]},
	{56, "Version", "Health.Version", "the version is in the program that the agent runs", proveVersion, with[noVersion]},
	{57, "MemAgentMemcgSet", "MemAgentMemcgSet", "UNIMPLEMENTED", proveMemAgentMemcgSet, with[noMemAgentMemcgSet]},
	{58, "MemAgentCompactSet", "MemAgentCompactSet", "UNIMPLEMENTED", proveMemAgentCompactSet, with[noMemAgentCompactSet]},
}

const tracing = "/sys/kernel/tracing"

// watchReseeds has the guest's kernel say when it mixes bytes into its pool
// (what is written to /dev/random goes through blake2s_update), and when it
// makes a new key of that (crng_reseed; drivers/char/random.c).
const watchReseeds = "mount -t tracefs tracefs " + tracing + " && cd " + tracing +
	` && echo 'p:rows/mixed blake2s_update first=+0($arg2):x8[8] len=$arg3:u64' > kprobe_events` +
	` && echo 'p:rows/reseeded crng_reseed' >> kprobe_events && echo 1 > events/rows/enable`

const unwatchReseeds = "cd " + tracing + " && echo 0 > events/rows/enable && echo > kprobe_events && echo > trace; cd / && umount " + tracing

func proveReseedRNG(e *env) {
	if e.look("grep tracefs /proc/filesystems; true") == "" { // the tuned kernel
		e.is("nothing to seed with", e.ReseedRNG(e.ctx, nil), errdefs.ErrInvalidArgument)
		return
	}
	if option(e.guest.Cmdline(), "-accel") == qemu.TCG { // under KVM nobody has seen clones through
		e.reseedClones()
	}
	e.undo.Add(e.guestDo(unwatchReseeds))
	e.look(watchReseeds)
	seed := []byte("\x11\x22\x33\x44\x55\x66\x77\x88" + fmt.Sprint(time.Now().UnixNano()))
	e.ok(e.ReseedRNG(e.ctx, seed))
	trace := e.look("cat " + tracing + "/trace")
	_, after, mixed := strings.Cut(trace, fmt.Sprintf("first={0x11,0x22,0x33,0x44,0x55,0x66,0x77,0x88} len=%d", len(seed)))
	if !mixed {
		e.fail("the bytes were not mixed in: %s", trace)
	}
	if !strings.Contains(after, "reseeded:") {
		e.fail("the generator was not seeded after that: %s", trace)
	}
}

func proveGuestDetails(e *env) {
	d, err := e.GuestDetails(e.ctx)
	e.ok(err)
	const dir = "/sys/devices/system/memory/"
	size, err := strconv.ParseUint(e.look("cat "+dir+"block_size_bytes"), 16, 64)
	e.ok(err)
	e.equal("block size", d.GetMemBlockSizeBytes(), size)
	e.equal("probe file", d.GetSupportMemHotplugProbe(), e.look("test -e "+dir+"probe && echo yes; true") == "yes")
	e.equal("init", d.GetAgentDetails().GetInitDaemon(), e.look("awk '/^PPid/{print $2}' "+e.guest.agent+"/status") == "1")
	if len(d.GetAgentDetails().GetStorageHandlers()) == 0 || len(d.GetAgentDetails().GetDeviceHandlers()) == 0 {
		e.fail("handlers: %v", d.GetAgentDetails())
	}
}

func proveSetGuestDateTime(e *env) {
	e.undo.Add(func() error {
		ctx, cancel := e.later()
		defer cancel()
		return e.guest.client.SetGuestDateTime(ctx, time.Now())
	})
	// To a wrong time first: where there is KVM the guest finds the right one itself.
	for _, ahead := range []time.Duration{-time.Hour, 0} {
		var off, way time.Duration
		set := false
		for range 5 { // what the question took on its way is not the clock's fault
			e.ok(e.SetGuestDateTime(e.ctx, time.Now().Add(ahead)))
			o, err := e.guest.ask(e.ctx, "true")
			e.ok(err)
			off, way = o.Time.Sub(o.sent)-ahead, o.back.Sub(o.sent)
			if set = off.Abs() < 50*time.Millisecond; set {
				break
			}
		}
		if !set {
			e.fail("the guest's clock is %v ahead of what was set, seen within %v", off, way)
		}
	}
}

func proveCopyFile(e *env) {
	dir := e.t.TempDir()
	e.ok(os.Mkdir(filepath.Join(dir, "sub"), 0o750))
	e.ok(os.WriteFile(filepath.Join(dir, "sub", "file"), noise()[:3*mib], 0o640)) // several pieces
	e.ok(os.Chmod(filepath.Join(dir, "sub", "file"), 0o640))
	e.ok(os.Chown(filepath.Join(dir, "sub", "file"), 5, 6))
	e.ok(os.Symlink("nowhere", filepath.Join(dir, "sub", "dangling")))
	e.ok(os.Symlink("/etc", filepath.Join(dir, "out")))
	e.ok(os.WriteFile(filepath.Join(dir, "evil"), []byte("x"), 0o644))
	name := fmt.Sprintf("copied%d", time.Now().UnixNano())
	to := shareDir + "/" + name
	e.undo.Add(func() error { return os.RemoveAll(filepath.Join(e.guest.Share, name)) })

	e.ok(e.CopyFile(e.ctx, filepath.Join(dir, "sub"), to))
	e.equal("copy", e.look("cd "+to+"; stat -c '%n %a %u %g %s' . file; readlink dangling; md5sum < file; ls"),
		fmt.Sprintf(". 750 0 0 %s\nfile 640 5 6 %d\nnowhere\n%s  -\ndangling\nfile", e.look("stat -c %s "+to), 3*mib, md5sum(noise()[:3*mib])))
	e.ok(e.CopyFile(e.ctx, filepath.Join(dir, "out"), to+"/out"))
	for _, path := range []string{"/etc/evil", to + "/../../evil", to + "/out/evil", shareDir} {
		if err := e.CopyFile(e.ctx, filepath.Join(dir, "evil"), path); err == nil {
			e.fail("%s was written", path)
		}
	}
	e.equal("written outside", e.look("ls /etc/evil "+shareDir+"/../evil 2>/dev/null; true"), "")
}

var metric = regexp.MustCompile(`^([a-z_]+(?:\{item="[^"]*"\})?) (-?[0-9.e+]+)$`)

func proveMetrics(e *env) {
	read := func() map[string]float64 {
		text, err := e.Metrics(e.ctx)
		e.ok(err)
		values := map[string]float64{}
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "#") {
				continue
			}
			m := metric.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
			if m == nil {
				e.fail("line %q is no metric", line)
			}
			values[m[1]], _ = strconv.ParseFloat(m[2], 64)
		}
		return values
	}
	const files = "kata_agent_process_open_fds"
	before := read()
	total := float64(e.number("awk '/^MemTotal/{print $2}' /proc/meminfo")) * 1024
	e.equal("memory", before[`kata_guest_meminfo{item="memtotal"}`], total)
	open := e.number("ls " + e.guest.agent + "/fd | wc -l")
	for range 5 {
		_, c := e.client(e.settings())
		dials(e, c)
	}
	more := e.number("ls "+e.guest.agent+"/fd | wc -l") - open
	e.equal("open files that came", read()[files]-before[files], float64(more))
	if more < 5 {
		e.fail("five clients made %d files", more)
	}
}

func proveSetPolicy(e *env) {
	e.is("policy", e.SetPolicy(e.ctx, "package agent_policy"), errdefs.ErrNotImplemented)
}

func proveVersion(e *env) {
	api, version, err := e.Version(e.ctx)
	e.ok(err)
	if api == "" || version == "" {
		e.fail("versions %q and %q", api, version)
	}
	e.look("tr '\\0' '\\n' < " + e.guest.agent + "/exe | grep -q -F '" + version + "'")
}

func proveMemAgentMemcgSet(e *env) {
	e.is("memcg", e.MemAgentMemcgSet(e.ctx, &protocol.MemAgentMemcgConfig{}), errdefs.ErrNotImplemented)
}

func proveMemAgentCompactSet(e *env) {
	e.is("compact", e.MemAgentCompactSet(e.ctx, &protocol.MemAgentCompactConfig{}), errdefs.ErrNotImplemented)
}
