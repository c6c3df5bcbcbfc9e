package shim

import (
	"context"
	"os"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// withLogger returns a context whose logger writes to stderr, where containerd
// reads the daemon's log.
func withLogger(ctx context.Context, c command) context.Context {
	// A containerd that reads no log must not stop the daemon.
	_ = unix.SetNonblock(unix.Stderr, true)
	l := logrus.New()
	l.SetOutput(dropWriter{})
	l.SetFormatter(&logrus.TextFormatter{TimestampFormat: log.RFC3339NanoFixed, FullTimestamp: true, DisableColors: true})
	if c.debug {
		l.SetLevel(logrus.DebugLevel)
	}
	return log.WithLogger(ctx, logrus.NewEntry(l).WithFields(log.Fields{
		"runtime":    Name,
		"namespace":  c.namespace,
		"sandbox_id": c.id,
		"pid":        os.Getpid(),
	}))
}

// dropWriter writes to stderr, and drops what does not go at once.
type dropWriter struct{}

func (dropWriter) Write(p []byte) (int, error) {
	_, _ = unix.Write(unix.Stderr, p)
	return len(p), nil
}
