package ociimage

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"
)

func TestSameBytesAndDigests(t *testing.T) {
	var one, two bytes.Buffer
	for _, out := range []*bytes.Buffer{&one, &two} {
		if err := Write(t.Context(), out, Busybox); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("two images of one busybox differ")
	}
	blobs := 0
	for r := tar.NewReader(&one); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		digest, ok := strings.CutPrefix(h.Name, "blobs/sha256/")
		if !ok || digest == "" {
			continue
		}
		blobs++
		sum := sha256.New()
		if _, err := io.Copy(sum, r); err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(sum.Sum(nil)); got != digest {
			t.Errorf("blob %s has digest %s", digest, got)
		}
	}
	if blobs != 3 {
		t.Errorf("%d blobs, want layer, configuration and manifest", blobs)
	}
}

func TestNoBusybox(t *testing.T) {
	if err := Write(t.Context(), io.Discard, "/nonexistent"); err == nil || !strings.Contains(err.Error(), "busybox-static") {
		t.Errorf("error %v does not say what to install", err)
	}
}
