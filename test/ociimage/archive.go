package ociimage

import (
	"archive/tar"
	"bytes"
	"time"
)

// An entry is a file of an archive; all belong to root and have no time.
type entry struct {
	header  tar.Header
	content []byte
}

func dir(name string, mode int64) entry {
	return entry{header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}}
}

func file(name string, mode int64, content []byte) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))}, content}
}

func link(name, to string) entry {
	return entry{header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to, Mode: 0o755}}
}

func archive(entries []entry) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		e.header.ModTime = time.Unix(0, 0)
		if err := w.WriteHeader(&e.header); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
