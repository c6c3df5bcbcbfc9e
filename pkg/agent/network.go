package agent

import (
	"context"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

// UpdateInterface implements Network.
func (c *Client) UpdateInterface(ctx context.Context, iface *types.Interface) (*types.Interface, error) {
	return ask(ctx, c.peer.Load(), service.UpdateInterface, &protocol.UpdateInterfaceRequest{Interface: iface})
}

// ListInterfaces implements Network.
func (c *Client) ListInterfaces(ctx context.Context) ([]*types.Interface, error) {
	answer, err := ask(ctx, c.peer.Load(), service.ListInterfaces, &protocol.ListInterfacesRequest{})
	return answer.GetInterfaces(), err
}

// UpdateRoutes implements Network.
func (c *Client) UpdateRoutes(ctx context.Context, routes []*types.Route) ([]*types.Route, error) {
	answer, err := ask(ctx, c.peer.Load(), service.UpdateRoutes, &protocol.UpdateRoutesRequest{
		Routes: &protocol.Routes{Routes: routes},
	})
	return answer.GetRoutes(), err
}

// ListRoutes implements Network.
func (c *Client) ListRoutes(ctx context.Context) ([]*types.Route, error) {
	answer, err := ask(ctx, c.peer.Load(), service.ListRoutes, &protocol.ListRoutesRequest{})
	return answer.GetRoutes(), err
}

// AddARPNeighbors implements Network.
func (c *Client) AddARPNeighbors(ctx context.Context, neighbors []*types.ARPNeighbor) error {
	return tell(ctx, c.peer.Load(), service.AddARPNeighbors, &protocol.AddARPNeighborsRequest{
		Neighbors: &protocol.ARPNeighbors{ARPNeighbors: neighbors},
	})
}

// IPTables implements Network.
func (c *Client) IPTables(ctx context.Context, ipv6 bool) ([]byte, error) {
	answer, err := ask(ctx, c.peer.Load(), service.GetIPTables, &protocol.GetIPTablesRequest{IsIpv6: ipv6})
	return answer.GetData(), err
}

// SetIPTables implements Network.
func (c *Client) SetIPTables(ctx context.Context, ipv6 bool, data []byte) error {
	_, err := ask(ctx, c.peer.Load(), service.SetIPTables, &protocol.SetIPTablesRequest{IsIpv6: ipv6, Data: data})
	return err
}
