// Package shim is what containerd talks to: the start, delete and -info
// commands in every dialect of the daemon, the task service in versions 2 and
// 3, events, and the copying of standard streams.
package shim
