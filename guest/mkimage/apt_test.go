package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseStanza(t *testing.T) {
	got := parseStanza(`Package: iptables
Version: 1.8.9-2
Architecture: amd64
Maintainer: Somebody <a@example.org>
Pre-Depends: libpre0 (>= 1)
Depends: libip4tc2 (= 1.8.9-2), libmnl0 (>= 1.0.3-4~), netbase | other (<< 2), python3:any
Description: tools for packets
 Depends: this is prose
Filename: pool/main/i/iptables/iptables_1.8.9-2_amd64.deb
SHA256: 2928d3`)
	want := pkg{
		Name: "iptables", Version: "1.8.9-2", Arch: "amd64", SHA256: "2928d3",
		File:    "pool/main/i/iptables/iptables_1.8.9-2_amd64.deb",
		Depends: []string{"libpre0", "libip4tc2", "libmnl0", "netbase", "python3"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
