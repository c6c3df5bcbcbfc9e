package guest

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParsePCIPath(t *testing.T) {
	for in, want := range map[string]string{
		"02": "02", "02/05": "02/05", "1f/00/1f": "1f/00/1f", "02.0/05.7": "02/05.7", "0a/0B": "0a/0b",
		"": "", "2/05": "", "02/": "", "/02": "", "02//05": "", "20/00": "", "02.8": "", "02.": "", "02.10": "", "+2": "",
		"02/05\n": "", "0x2": "", "../05": "", "02/../05": "",
		"00/00/00/00/00/00/00/00/00/00/00/00/00/00/00/00/00": "",
	} {
		path, err := parsePCIPath(in)
		switch {
		case want == "" && !errdefs.IsInvalidArgument(err):
			t.Errorf("%q: %v, %v", in, path, err)
		case want != "" && (err != nil || path.String() != want):
			t.Errorf("%q: %v, %v, want %s", in, path, err, want)
		}
	}
	if path, err := slotsPath([]uint32{2, 31}); err != nil || path.String() != "02/1f" {
		t.Errorf("%v, %v", path, err)
	}
	for _, bad := range [][]uint32{nil, {32}, {1, 1 << 31}, make([]uint32, 17)} {
		if path, err := slotsPath(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v, %v", bad, path, err)
		}
	}
}

func FuzzParsePCIPath(f *testing.F) {
	for _, s := range []string{"02/05", "02.0/1f.7", "//", "20/00", "ff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		path, err := parsePCIPath(s)
		if err != nil {
			return
		}
		again, err := parsePCIPath(path.String())
		if err != nil || !slices.Equal(path, again) || len(path) == 0 || len(path) > maxPCIDepth {
			t.Errorf("%q: %v, then %v, %v", s, path, again, err)
		}
	})
}

func TestParseSCSI(t *testing.T) {
	for in, want := range map[string]string{
		"0:0": "0:0", "255:16383": "255:16383", "1:02": "1:2",
		"": "", "1": "", "1:": "", ":1": "", "256:0": "", "0:16384": "", "0:0:0": "", "-1:0": "", "*:0": "",
	} {
		a, err := parseSCSI(in)
		if want == "" && !errdefs.IsInvalidArgument(err) || want != "" && (err != nil || a.String() != want) {
			t.Errorf("%q: %v, %v, want %q", in, a, err, want)
		}
	}
}

func TestParseVFIO(t *testing.T) {
	host, path, err := parseVFIO("0000:03:0A.1=02/05")
	if host != "0000:03:0a.1" || path.String() != "02/05" || err != nil {
		t.Errorf("got %q, %v, %v", host, path, err)
	}
	for _, bad := range []string{"", "=", "0000:03:00.0", "0000:03:00.0=", "03:00.0=02", "0000:03:00.8=02", "x0000:03:00.0=02", "=02/05"} {
		if host, path, err := parseVFIO(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q, %v, %v", bad, host, path, err)
		}
	}
}

func TestGuestAddresses(t *testing.T) {
	env := []string{
		"PCIDEVICE_INTEL_COM_NIC=0000:03:00.0,0000:04:00.1",
		`PCIDEVICE_INTEL_COM_NIC_INFO={"0000:03:00.0":{"generic":{"deviceID":"0000:03:00.0"}}}`,
		"OTHER=0000:03:00.0",
		"PCIDEVICE_X=0000:05:00.0",
	}
	got := guestAddresses(env, map[string]string{"0000:03:00.0": "0000:01:05.0", "0000:04:00.1": "0000:03:00.0"})
	want := []string{
		"PCIDEVICE_INTEL_COM_NIC=0000:01:05.0,0000:03:00.0",
		`PCIDEVICE_INTEL_COM_NIC_INFO={"0000:01:05.0":{"generic":{"deviceID":"0000:01:05.0"}}}`,
		"OTHER=0000:03:00.0",
		"PCIDEVICE_X=0000:05:00.0",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}
