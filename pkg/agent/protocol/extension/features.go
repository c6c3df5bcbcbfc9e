package extension

// Ports of the guest. 1024 is the protocol's, the other one ours.
const (
	// AgentPort serves grpc.AgentService, grpc.Health and Extension.
	AgentPort = 1024
	// StreamPort accepts one connection per standard stream of a process.
	StreamPort = 1028
)

// Names in AgentDetails.extra_features.
const (
	// FeatureExtension says that the Extension service is served on AgentPort.
	FeatureExtension = "vmshim.extension.v1"
	// FeatureStreams says that StreamPort accepts streams. Version 1 had no receipts,
	// those of version 2 did not count the chunks' lengths.
	FeatureStreams = "vmshim.streams.v3"
	// FeatureConnect says that StreamPort connects to ports in the containers'
	// network. Version 1 had no receipts.
	FeatureConnect = "vmshim.connect.v2"
)

// ReadyParam is the kernel parameter that asks the agent to say that it
// serves: vmshim.ready=cid. The agent connects to the port of the host that has
// the number of the guest's context id, and closes; again when the guest has got
// another vsock device, as one that goes on from a template does.
const ReadyParam = "vmshim.ready"
