package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// hugePages are those of one storage.
type hugePages struct {
	pageSize uint64 // bytes
	count    uint64
	options  []string // of the mount, in bytes
}

// parseHugePages reads pagesize= and size= of a hugetlbfs, which may come in
// one option, with the units of Kubernetes or the kernel's.
func parseHugePages(options []string) (hugePages, error) {
	var p hugePages
	var size uint64
	for _, list := range options {
		for o := range strings.SplitSeq(list, ",") {
			key, value, _ := strings.Cut(o, "=")
			var to *uint64
			switch key {
			case "pagesize":
				to = &p.pageSize
			case "size":
				to = &size
			default:
				p.options = append(p.options, o)
				continue
			}
			n, err := parseBytes(value)
			if err != nil {
				return hugePages{}, invalid("option %q", bound(o, 64))
			}
			*to = n
			p.options = append(p.options, fmt.Sprintf("%s=%d", key, n))
		}
	}
	if p.pageSize == 0 || size == 0 {
		return hugePages{}, invalid("huge pages without pagesize and size")
	}
	p.count = (size-1)/p.pageSize + 1
	return p, nil
}

// parseBytes reads a number with K, M or G, or Ki, Mi or Gi: powers of 1024, as
// for the kernel.
func parseBytes(s string) (uint64, error) {
	s = strings.TrimSuffix(s, "i")
	shift := 0
	if s != "" {
		if i := strings.IndexByte("KMG", s[len(s)-1]&^0x20); i >= 0 {
			s, shift = s[:len(s)-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(s, 10, 63-shift)
	return n << shift, err
}

// allocate adds pages to the kernel's pool.
func (s *storages) allocate(ctx context.Context, p hugePages) error {
	if err := s.hugePages.acquire(ctx); err != nil {
		return err
	}
	defer s.hugePages.release()
	before, err := s.setPages(p, func(n uint64) uint64 { return n + p.count })
	if err != nil {
		return err
	}
	got, err := s.pages(p)
	if err == nil && got < before+p.count { // the kernel takes what it can get
		_, err = s.setPages(p, func(uint64) uint64 { return before })
		if err == nil {
			err = fmt.Errorf("%d of %d huge pages of %d bytes: %w", got-min(before, got), p.count, p.pageSize, errdefs.ErrResourceExhausted)
		}
	}
	return err
}

// free takes them back. Pages in use stay until they are not.
func (s *storages) free(p hugePages) error {
	s.hugePages <- struct{}{} // it is never held for long
	defer s.hugePages.release()
	_, err := s.setPages(p, func(n uint64) uint64 { return n - min(n, p.count) })
	return err
}

func (s *storages) setPages(p hugePages, change func(uint64) uint64) (before uint64, err error) {
	before, err = s.pages(p)
	if err == nil {
		err = os.WriteFile(s.pagesFile(p), []byte(strconv.FormatUint(change(before), 10)), 0)
	}
	return before, err
}

func (s *storages) pages(p hugePages) (uint64, error) {
	b, err := os.ReadFile(s.pagesFile(p))
	if err != nil {
		return 0, invalid("no huge pages of %d bytes", p.pageSize)
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
}

func (s *storages) pagesFile(p hugePages) string {
	return filepath.Join(s.devices.sys, "kernel/mm/hugepages", fmt.Sprintf("hugepages-%dkB", p.pageSize>>10), "nr_hugepages")
}
