package main

import (
	"net/http"
	"regexp"
	"strconv"

	"github.com/vmshim/vmshim/test/ociimage"
)

// A registry answers pulls, as the OCI distribution specification has it, for
// every registry that its images are named after: a mirror says in the query
// which one is meant.
type registry struct {
	images map[string]*ociimage.Layout // by name
}

var pull = regexp.MustCompile(`^/v2/(.+)/(manifests|blobs)/([^/]+)$`)

func (r registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/v2/" {
		return
	}
	parts := pull.FindStringSubmatch(req.URL.Path)
	if parts == nil {
		http.NotFound(w, req)
		return
	}
	name, kind, reference := req.URL.Query().Get("ns")+"/"+parts[1], parts[2], parts[3]
	digest, blob := r.find(name, reference)
	if blob == nil {
		http.NotFound(w, req)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if kind == "manifests" {
		w.Header().Set("Content-Type", ociimage.TypeManifest)
	}
	w.Header().Set("Docker-Content-Digest", digest)
	w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
	if req.Method != http.MethodHead {
		_, _ = w.Write(blob)
	}
}

// find finds a manifest by its tag, or a blob by its digest.
func (r registry) find(name, reference string) (digest string, blob []byte) {
	if image := r.images[name+":"+reference]; image != nil {
		return image.Digest, image.Blobs[image.Digest]
	}
	for _, image := range r.images {
		if blob := image.Blobs[reference]; blob != nil {
			return reference, blob
		}
	}
	return "", nil
}
