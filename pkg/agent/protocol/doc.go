// Package protocol is the agent protocol on the wire: the .proto files and the
// code generated from them, nothing else. docs/agent-protocol.md explains it.
package protocol
