package vsock

import (
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"
)

// KernelURL names a port of the guest with the given context id.
func KernelURL(cid, port uint32) string { return fmt.Sprintf("vsock://%d:%d", cid, port) }

// HybridURL names a port of the guest behind the unix socket at path.
func HybridURL(path string, port uint32) string { return fmt.Sprintf("hvsock://%s:%d", path, port) }

// Parse reads an agent URL, vsock://CID:PORT or hvsock://PATH:PORT.
func Parse(url string) (Dialer, uint32, error) {
	scheme, rest, _ := strings.Cut(url, "://")
	colon := strings.LastIndexByte(rest, ':')
	if colon < 0 {
		return nil, 0, fmt.Errorf("agent url %q: no port", url)
	}
	host, number := rest[:colon], rest[colon+1:]
	port, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return nil, 0, fmt.Errorf("agent url %q: port: %w", url, err)
	}
	switch scheme {
	case "vsock":
		cid, err := strconv.ParseUint(host, 10, 32)
		if err != nil {
			return nil, 0, fmt.Errorf("agent url %q: context id: %w", url, err)
		}
		if cid == math.MaxUint32 { // VMADDR_CID_ANY can be listened on only
			return nil, 0, fmt.Errorf("agent url %q: context id %d is nobody's", url, cid)
		}
		return Kernel(uint32(cid)), uint32(port), nil
	case "hvsock":
		if !filepath.IsAbs(host) {
			return nil, 0, fmt.Errorf("agent url %q: path %q is not absolute", url, host)
		}
		return Hybrid(host), uint32(port), nil
	}
	return nil, 0, fmt.Errorf("agent url %q: scheme %q is not vsock or hvsock", url, scheme)
}
