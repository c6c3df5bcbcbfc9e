// Package guest is the agent as it runs in the virtual machine: the first
// process, and its child that serves the agent protocol.
package guest
